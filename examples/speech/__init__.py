"""Speech with cenote: from wav files to tables and plots."""
