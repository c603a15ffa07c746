"""What is wrong with a particle set, found before hours are spent on it."""

from cryoai.checks.checking import QUICK_SAMPLE, check_particles
from cryoai.checks.findings import CheckReport, Finding, Level, Measurements

__all__ = ["QUICK_SAMPLE", "CheckReport", "Finding", "Level", "Measurements", "check_particles"]
