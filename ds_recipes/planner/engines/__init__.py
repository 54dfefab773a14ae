"""What each engine keeps on a rank, moment by moment."""
