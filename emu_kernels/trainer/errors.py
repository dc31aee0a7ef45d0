"""Errors that a person can act on. The command line prints them without a traceback."""


class TrainerError(Exception):
    """Base class: something outside the program is wrong."""


class DataError(TrainerError):
    """A dataset is missing, malformed, or differs from its checksum."""


class ConfigError(TrainerError):
    """A setting has a value that cannot work."""


class RunError(TrainerError):
    """A run folder cannot be written, read or continued."""


class TrainingError(TrainerError):
    """Training cannot go on: its loss is not finite."""
