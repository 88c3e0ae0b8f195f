"""HTML pages that contain all that they show: what the pages of runs and of the doctor share."""
