"""Ab initio cryo-EM reconstruction by amortized inference."""

__version__ = "0.1.0"
