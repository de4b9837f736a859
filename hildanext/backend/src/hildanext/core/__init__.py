"""What everything stands on: errors, configuration, the registry of families, run folders. Loads no torch."""
