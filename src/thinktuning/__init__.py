"""ThinkTuning: a Lightning trainer that teaches a language model behaviors it never samples."""

__version__ = "0.1.0"
