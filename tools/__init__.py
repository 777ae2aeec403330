"""What only developers use: reading compiled code. Run from the repository's root; no part of the wheel."""
