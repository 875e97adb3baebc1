"""What everything else stands on: types, errors, registries, statistics, progress, files."""
