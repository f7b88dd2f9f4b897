"""Deltasync keeps a folder's content on a remote host before a job needs it."""

__version__ = "0.1.0"
