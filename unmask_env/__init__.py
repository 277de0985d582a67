"""Unmasking as a Markov decision process around a frozen denoiser. Importing it registers the ``Unmask/`` ids."""

from unmask_env.registration import ids, register

__all__ = ["ids", "register"]

register("Unmask/Sudoku4x4-v0", task="sudoku4", denoiser="sudoku4")
register("Unmask/Sudoku6x6-v0", task="sudoku6", denoiser="sudoku6")
register("Unmask/Sudoku9x9-v0", task="sudoku9", denoiser="sudoku9")
