import pytest

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.probing.attribute_tables import read_awa2_attributes, read_celeba_attributes


def test_celeba(test_data):
    folder = test_data / "attributes/celeba"
    table = read_celeba_attributes(folder / "list_attr_celeba.txt")
    assert table.values.shape == (559, 40) and len(table.keys) == 559
    assert all((folder / "img_align_celeba" / key).is_file() for key in table.keys)
    first = dict(zip(table.names, table.values[0].tolist(), strict=True))
    assert table.keys[0] == "000001.jpg" and first["Smiling"] == first["Young"] == 1 and first["Male"] == 0


def test_awa2(test_data):
    table = read_awa2_attributes(test_data / "attributes/awa2")
    assert table.values.shape == (50, 85)
    row = dict(zip(table.names, table.values[table.keys.index("giant+panda")].tolist(), strict=True))
    assert row["black"] == row["white"] == row["furry"] == 1 and row["flys"] == row["ocean"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Smiling Young\n1.jpg 1 -1\n", "number of pictures"),
        ("2\nSmiling Young\n1.jpg 1 -1\n", "announces 2 pictures but lists 1"),
        ("1\nSmiling Young\n1.jpg 1\n", "line 3: 1 values for 2"),
        ("1\nSmiling Young\n1.jpg 1 0\n", "line 3: '0' is neither"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, said):
    path = tmp_path / "attributes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        read_celeba_attributes(path)
    assert str(path) in str(raised.value)


def test_absent_files_are_named(tmp_path):
    for reader in (read_celeba_attributes, read_awa2_attributes):
        with pytest.raises(UserError, match="cannot read"):
            reader(tmp_path / "absent")
