"""What is right: plain implementations that say what the optimized ones must compute."""
