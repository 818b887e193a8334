"""`slope plan`: memory and time of a layout, from the configuration alone."""
