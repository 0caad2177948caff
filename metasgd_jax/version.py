"""The version of the package. This module imports nothing, so that a wheel can be built without the dependencies."""

__version__ = '0.1.0'
