"""Post-processing: functions of released quantities and public numbers, which cost no privacy."""
