"""Small models of the packages that people use keep their tasks; ``.ci/ecosystem`` runs this."""

from __future__ import annotations

import pytest
from ecosystem import stopgap, zoo
from ecosystem.check import check

MODELS = zoo.table()

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_its_tasks(name: str) -> None:
    model = MODELS[name]
    if model.lacks:
        pytest.skip(model.lacks)
    result = check(name, model)
    print(result.line())
    if stopgap.NEEDED and name in stopgap.BROKEN and result.broken():
        pytest.xfail(stopgap.BROKEN[name])
    assert result.broken() == [], "\n".join(result.traces)
    if not stopgap.NEEDED:
        assert result.short_of() == []
