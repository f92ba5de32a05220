"""What comes from outside (names and text that somebody else wrote), checksums, and whole folders."""
