"""Known bugs, put back into our own code, each of which the suites must catch."""
