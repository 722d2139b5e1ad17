"""The engines that run our schedules: plan notes where things are, run launches."""
