"""What saffe report does: runs, ablations and episodes read, and made into one page with plots and galleries."""
