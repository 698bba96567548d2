"""The data module's names."""

from train.corpus import Document
from train.text import RandomBatches, TextData, check_sizes

__all__ = ["Document", "RandomBatches", "TextData", "check_sizes"]
