"""cenote inside other libraries: one file each, which imports the library where it is used."""
