"""The commands of `tbrm`."""
