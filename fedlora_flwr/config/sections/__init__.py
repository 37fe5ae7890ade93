"""The sections of the run configuration, one file each."""
