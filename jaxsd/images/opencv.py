"""OpenCV, which only an extra brings: its 160 MB serve hints and the filling of masked areas."""

from types import ModuleType


def opencv(what: str) -> ModuleType:
    """The module cv2. what: who needs it, for the ImportError where it is not installed."""
    try:
        import cv2
    except ModuleNotFoundError:
        raise ImportError(f"{what} needs OpenCV: pip install 'jaxsd[hints]'") from None
    return cv2
