"""Read datasets as items, and files as pictures and sounds. Only this package knows where data comes from.

`--data` takes any of the formats in `registry`, which recognises them by what lies there. A new format is one module
here and one entry there: see `registry.Format`. `items` defines what a format yields, `decoding` decodes media.
"""

from saffe_cache.sources.decoding import decode, thumbnail
from saffe_cache.sources.items import Columns, Media, SourceItem, is_file_fault
from saffe_cache.sources.registry import read_items, read_named_items

__all__ = ["Columns", "Media", "SourceItem", "decode", "is_file_fault", "read_items", "read_named_items", "thumbnail"]
