"""The presentation of a study: figures, the report page, its gallery, and the terminal."""
