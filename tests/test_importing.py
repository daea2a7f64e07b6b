"""Errors of import paths say how to name a function in a file."""

import pytest

from lightning_ft.errors import ConfigError
from lightning_ft.importing import import_object


def test_missing_module_error_names_the_form_for_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "no_such_package_of_mine.margins_of_mine.margin"
    with pytest.raises(ConfigError, match=r"loss='no_such_.*No module named.*path/to/file\.py:function.*PYTHONPATH"):
        import_object(path, argument="loss", error=ConfigError)
    folder = tmp_path / "no_such_package_of_mine"
    folder.mkdir()
    (folder / "margins_of_mine.py").write_text("def margin(chosen, rejected):\n    return chosen\n")
    name = "no_such_package_of_mine/margins_of_mine.py:margin"
    with pytest.raises(ConfigError, match=f"There is a file .*: write {name}"):
        import_object(path, argument="loss", error=ConfigError)
    assert import_object(name, argument="loss", error=ConfigError)(1, 2) == 1


def test_missing_name_error_has_no_advice_for_modules():
    with pytest.raises(
        ConfigError, match=r"loss='math\.nothing' can't be imported: module 'math' has no attribute"
    ) as info:
        import_object("math.nothing", argument="loss", error=ConfigError)
    assert "PYTHONPATH" not in str(info.value)


def test_missing_name_of_another_module_leads_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("def rows():\n    return []\n")
    with pytest.raises(ConfigError, match=r"no attribute 'rows'\. There is a file 'json\.py': write json\.py:rows\."):
        import_object("json:rows", argument="train", error=ConfigError)
