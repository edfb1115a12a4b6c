"""Every way in which a user can be told that something is wrong.

An error of this module is the user's to mend: the command line prints its one line and exits with
code 2. Anything else is ours and keeps its traceback. A message says what came, what is allowed,
and the way out, in that order.
"""


class GadFastError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(GadFastError, ValueError):
    """A recipe holds an unknown key, a value out of its range, or settings that contradict."""


class DataError(GadFastError, ValueError):
    """A data file is missing, unreadable, lacks a column, or has nothing left after filtering."""


class ModelError(GadFastError, ValueError):
    """A model folder or Hub id cannot be loaded, or lacks what the game needs of it."""


class SymmetryError(GadFastError, ValueError):
    """Identical student and teacher text would not get the same score."""


class RunFolderError(GadFastError, FileExistsError):
    """The run folder already holds another run, or cannot be written."""


class CheckpointError(GadFastError, RuntimeError):
    """A checkpoint cannot be written, or what a run folder holds cannot be gone on from."""


class HealthError(GadFastError, RuntimeError):
    """A watch whose action is `stop` raised its alarm; a checkpoint of the step is written."""


class EngineError(GadFastError, RuntimeError):
    """The rollout engine failed; carries the engine's own words."""


class NonFiniteError(GadFastError, ArithmeticError):
    """A loss or a gradient is not finite; raised before the update, so the weights are intact."""


class CacheError(GadFastError, RuntimeError):
    """A teacher cache cannot be opened, read, written, exported or imported."""


class CacheCorruptError(CacheError):
    """A teacher cache does not hold what was stored in it; names the row."""


class CacheLockedError(CacheError):
    """Another process writes to the teacher cache; names the process."""


class TeacherError(GadFastError, RuntimeError):
    """A teacher cannot be asked: no key, refused access, no such model, or too many failures."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C was pressed, and what was under way was finished and written."""
