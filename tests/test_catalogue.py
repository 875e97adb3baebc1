"""What `sukashi list` prints is what there is."""

import pytest

from sukashi import data, models
from sukashi.attributions import attributions
from sukashi.core.errors import UsageError
from sukashi.criteria import criteria
from sukashi.experiments import catalogue
from sukashi.measures import measures


@pytest.mark.parametrize(
    ("what", "registry"), [("criteria", criteria), ("attributions", attributions), ("measures", measures)]
)
def test_every_method_is_listed_with_what_it_gives_and_its_source(what, registry):
    rows = catalogue.rows(what)
    assert [row["name"] for row in rows] == registry.names() != []
    for row in rows:
        method = registry[row["name"]]
        assert (row["summary"], row["source"]) == (method.summary, method.source)


def test_models_and_data_are_listed_by_name():
    assert "sukashi:digits_cnn" in models.names()
    assert [row["name"] for row in catalogue.rows("models")] == list(models.names())
    assert [row["name"] for row in catalogue.rows("data")] == list(data.names())
    assert "digits" in data.names()


def test_an_unknown_list_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown list 'criterion': did you mean 'criteria'\?"):
        catalogue.rows("criterion")
