"""An index over tars that other software made."""
