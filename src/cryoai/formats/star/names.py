"""The columns of a particle STAR file that are understood, by what they mean."""

from __future__ import annotations

__all__ = [
    "ABERRATIONS",
    "ANGLES",
    "DEFOCUS",
    "DETECTOR",
    "HALF_SET",
    "IMAGE",
    "MICROSCOPE",
    "NUMBERS",
    "ORIGINS",
    "PIXEL_SIZES",
]

MICROSCOPE = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
DEFOCUS = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginX", "rlnOriginY")
PIXEL_SIZES = ("rlnImagePixelSize", "rlnPixelSize")
DETECTOR = ("rlnDetectorPixelSize", "rlnMagnification")
HALF_SET = "rlnRandomSubset"
OTHERS = ("rlnPhaseShift", "rlnCtfBfactor", "rlnOpticsGroup", HALF_SET)
NUMBERS = frozenset(MICROSCOPE + DEFOCUS + ANGLES + ORIGINS + PIXEL_SIZES + DETECTOR + OTHERS)
IMAGE = "rlnImageName"
# Aberrations that the calculation leaves out: what a person calls them, and the values that mean there are none.
ABERRATIONS: dict[str, tuple[str, float]] = {
    "rlnBeamTiltX": ("beam tilt", 0.0),
    "rlnBeamTiltY": ("beam tilt", 0.0),
    "rlnOddZernike": ("odd Zernike coefficients", 0.0),
    "rlnEvenZernike": ("even Zernike coefficients", 0.0),
    "rlnMagMat00": ("anisotropic magnification", 1.0),
    "rlnMagMat01": ("anisotropic magnification", 0.0),
    "rlnMagMat10": ("anisotropic magnification", 0.0),
    "rlnMagMat11": ("anisotropic magnification", 1.0),
}
