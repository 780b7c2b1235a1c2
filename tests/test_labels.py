"""Names and synsets of the classes of three ImageNets."""

import re

import pytest

from mixer_jax.labels import IMAGENETS, class_names, imagenet_names, imagenet_synsets


@pytest.mark.parametrize("num_classes", IMAGENETS)
def test_every_class_has_a_name_and_its_own_synset_in_sorted_order(num_classes):
    names, synsets = imagenet_names(num_classes), imagenet_synsets(num_classes)
    assert len(names) == len(synsets) == len(set(synsets)) == num_classes
    assert list(synsets) == sorted(synsets)
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in synsets)
    assert all(name and name == name.strip() for name in names)
    assert num_classes == 1000 or len(set(names)) == num_classes


def test_the_three_lists_agree_where_they_overlap():
    full, pruned = (dict(zip(imagenet_synsets(n), imagenet_names(n))) for n in (21_843, 11_221))
    assert pruned.items() < full.items()
    assert set(imagenet_synsets()) - full.keys() == {"n04399382"}
    assert len(set(imagenet_synsets()) - pruned.keys()) == 9
    assert {"n03931044", "n09859684"} < full.keys()  # those of Google's classes that the Fall 2011 version lacks
    assert (full["n01440764"], full["n00474568"]) == ("tench, Tinca tinca", "ball (n00474568)")


def test_names_are_presumed_by_number_of_classes_only_without_labels():
    own = [f"class {i}" for i in range(11_221)]
    assert class_names(11_221, own) is own
    assert class_names(11_221, None)[:2] == ("benthos", "cell")
    assert class_names(21_843, None)[0] == "organism, being"
    assert class_names(1000, None)[:2] == ("tench", "goldfish")
    assert class_names(21_841, None) is None
    with pytest.raises(ValueError, match="11221 labels for 21843 classes"):
        class_names(21_843, own)
