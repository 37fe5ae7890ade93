"""Hooks of MkDocs, which make docs/ a site."""
