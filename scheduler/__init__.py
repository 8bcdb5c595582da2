"""Scheduling: request traces and the prefill steps that they lead to."""
