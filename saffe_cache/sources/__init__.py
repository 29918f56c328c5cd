"""Datasets into items, and files into pictures and sounds. The only part that knows where data comes from.

Four kinds of `--data`, told apart by what lies there:

    folder of splits with class folders       train/cat/1.jpg                      label = folder name
    folder of splits with metadata.jsonl      train/metadata.jsonl, train/1.jpg    captions and labels as listed
    folder saved by datasets.save_to_disk     columns found by name
    anything else                             an id on the Hugging Face hub, columns found by name

`listing` tells them apart, `folders` and `hub` list the items, `items` has the nouns, `decoding` the decoders.
"""

from saffe_cache.sources.decoding import decode, thumbnail
from saffe_cache.sources.items import Columns, Media, SourceItem, blames_the_file
from saffe_cache.sources.listing import read_items, read_named_items

__all__ = ["Columns", "Media", "SourceItem", "blames_the_file", "decode", "read_items", "read_named_items", "thumbnail"]
