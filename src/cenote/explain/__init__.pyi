# written by scripts/build_stubs.py from the catalog; do not edit
