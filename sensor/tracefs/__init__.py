"""Tracefs: find it, read event formats, define probes, render kernel filters."""
