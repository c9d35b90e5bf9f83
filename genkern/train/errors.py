"""What goes wrong outside the code: said to the user in one sentence, without a traceback."""


class TrainError(Exception):
    """A file, a folder, an option or a disk that is not as it should be."""
