"""Reading the volume of a VM that does not run. Its content is a guest's: nothing in it is believed."""
