"""What each measure is, in words."""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, str] = {
    "cka": "CKA",
    "mutual_neighbours": "shared neighbours",
    "svcca": "SVCCA",
    "a_0": "A_0",
    "a_lin": "A_lin",
    "a_new": "A_new",
    "a_mlp": "A_mlp",
    "a_tok": "A_tok",
}
"""For people."""

DEFINITIONS: Mapping[str, Mapping[str, str]] = {
    "captions": {
        "cka": "unbiased linear CKA: whether photos that are alike have captions that are alike. Null: captions dealt "
        "to photos at random",
        "mutual_neighbours": "mean share of a photo's nearest photos whose captions are also its caption's nearest. "
        "Null: photos permuted",
        "svcca": "mean correlation, on judged photos, of the directions that go together best in others. Null: photos "
        "permuted, and fitted again",
        "a_0": "share of captions that find their photo first by the plain cosine. Null: captions dealt at random",
        "a_lin": "share of captions that find their photo first after a ridge regression from photos to captions, "
        "fitted on other photos. Null: judged pairs permuted",
    },
    "classes": {
        "cka": "unbiased linear CKA: whether photos that are alike belong to classes whose texts are alike. Null: the "
        "classes' texts dealt to classes at random, so that what photos of one class share stays",
        "mutual_neighbours": "mean share of a photo's nearest photos that are of its class: the texts do not enter, "
        "and all text layers are equal. Null: photos permuted",
        "svcca": "mean correlation, on judged photos, of directions that tell classes apart in others; classes less 1 "
        "of them at most, and hardly dependent on the texts. Null: photos permuted, and fitted again",
        "a_0": "share of photos whose nearest class text is their own by the plain cosine. Null: the classes' texts "
        "dealt to classes at random",
        "a_lin": "share of photos whose nearest class text is their own after a ridge regression from photos to class "
        "texts, fitted on other photos of these classes: it tells known classes apart, whatever their texts are. Null: "
        "judged photos permuted",
        "a_new": "share of photos of classes that the ridge regression has not seen whose nearest text of these "
        "classes is their own; mean over random halves of the classes, whose spread is the interval. Null: their texts "
        "dealt to them at random",
    },
}
"""Of each measure, for items with captions and for items with classes."""
