import numpy as np
import pytest

from dynmix.laws.runs import read_runs


def table(n=6, k=3, t=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(k), size=n), 3 + rng.random((n, t))


def write(path, names, *columns, index=None, delimiter=","):
    rows = np.hstack(columns).astype(str).tolist()
    if index is not None:
        names, rows = [index, *names], [[str(i + 1), *row] for i, row in enumerate(rows)]
    path.write_text("\n".join(delimiter.join(row) for row in [names, *rows]) + "\n")
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.csv"


def replaced(path, line, column, cell):
    """The file with another cell; `line` as an editor counts them."""
    lines = [row.split(",") for row in path.read_text().splitlines()]
    lines[line - 1][lines[0].index(column)] = cell
    path.write_text("\n".join(map(",".join, lines)) + "\n")
    return path


PLAIN = ["weight/web", "weight/code", "weight/math", "loss/web", "loss/arc"]
REGMIX = ["w_web", "w_code", "w_math", "loss_web", "loss_arc"]


@pytest.mark.parametrize("names", [PLAIN, REGMIX, ["train_web", "train_code", "train_math", "valid_web", "valid_arc"]])
@pytest.mark.parametrize("index", [None, "index", "", "run"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_layouts_with_prefixes(path, names, index, delimiter):
    W, L = table()
    runs = read_runs(write(path, names, W, L, index=index, delimiter=delimiter))
    assert runs.domains == ("web", "code", "math")
    assert runs.targets == ("web", "arc")
    np.testing.assert_allclose(runs.W, W)
    np.testing.assert_allclose(runs.L, L)
    assert runs.notes == []


def test_columns_without_prefixes_are_found_by_their_sum(path):
    W, L = table()
    runs = read_runs(write(path, ["web", "code", "math", "ppl", "arc"], W, L, index="trial"))
    assert runs.domains == ("web", "code", "math")
    assert runs.targets == ("ppl", "arc")
    assert "'web' to 'math'" in runs.notes[0]


def test_a_bad_cell_does_not_make_a_column_text(path):
    write(path, ["web", "code", "math", "ppl", "arc"], *table())
    with pytest.raises(ValueError, match="line 3, column 'arc': '3.1.2' is no number"):
        read_runs(replaced(path, 3, "arc", "3.1.2"))


def test_text_columns_and_a_byte_order_mark_are_passed_over(path):
    W, L = table()
    write(path, PLAIN, W, L)
    lines = path.read_text().splitlines()
    path.write_text("\ufeffrun name," + lines[0] + "\n" + "\n".join(f'"a, b",{x}' for x in lines[1:]) + "\n\n", "utf-8")
    assert read_runs(path).domains == ("web", "code", "math")


def test_two_files_are_joined_by_their_index_in_any_order(tmp_path):
    W, L = table()
    one = write(tmp_path / "mixtures.csv", ["train_a", "train_b", "train_c"], W, index="index")
    two = write(tmp_path / "losses.csv", ["valid_x", "valid_y"], L, index="index")
    lines = two.read_text().splitlines()
    two.write_text("\n".join([lines[0], *lines[:1:-1]]) + "\n")  # reversed, without run 1
    runs = read_runs(one, two)
    np.testing.assert_allclose(runs.W, W[1:])
    np.testing.assert_allclose(runs.L, L[1:])
    assert "1 rows are in only one" in runs.notes[0]


def test_columns_are_chosen_by_name_and_pattern(path):
    W, L = table()
    write(path, ["a", "b", "c", "x", "y"], W, L)
    runs = read_runs(path, weights="a,b,c", targets="y")
    assert (runs.domains, runs.targets) == (("a", "b", "c"), ("y",))


def test_missing_and_infinite_losses_are_missing(path):
    W, L = table()
    write(path, PLAIN, W, L)
    for line, cell in ((2, ""), (3, "NaN"), (4, "inf"), (5, "N/A")):
        replaced(path, line, "loss/arc", cell)
    runs = read_runs(path)
    np.testing.assert_array_equal(np.isnan(runs.L[:, 1]), [True] * 4 + [False] * 2)
    assert any("1 losses are infinite" in note for note in runs.notes)
    assert any("4 of 12 losses are missing" in note for note in runs.notes)


def test_what_is_odd_is_noted(path):
    W, L = table()
    W[:, 1] = 0
    W = 0.997 * W / W.sum(axis=1, keepdims=True)
    W[3] = W[2]
    notes = " ".join(read_runs(write(path, PLAIN, W, L)).notes)
    for said in ("6 runs sum to 1 only within 0.003", "no run had code", "1 runs repeat"):
        assert said in notes
    few, losses = table(n=3, k=17)
    names = [f"w_{i}" for i in range(17)] + ["loss_x", "loss_y"]
    assert any(
        "3 runs are fewer than the 17 domains" in note for note in read_runs(write(path, names, few, losses)).notes
    )


def test_a_score_is_pointed_out(path):
    notes = read_runs(write(path, [*PLAIN[:4], "loss/arc_acc"], *table())).notes
    assert notes == ["arc_acc: taken as a loss, lower is better; give minus it if higher is"]


def test_per_cent_and_empty_weights_that_can_only_be_zero(path):
    W, L = table()
    np.testing.assert_allclose(read_runs(write(path, PLAIN, 100 * W, L)).W, W)
    W[2] = [0.25, 0, 0.75]
    replaced(write(path, PLAIN, W, L), 4, "weight/code", "")
    runs = read_runs(path)
    np.testing.assert_allclose(runs.W, W)
    assert any("1 empty cells of weights are 0" in note for note in runs.notes)


def test_a_target_with_one_loss_is_left_out(path):
    W, L = table()
    L[1:, 0] = np.nan
    runs = read_runs(write(path, PLAIN, W, L))
    assert runs.targets == ("arc",)
    assert "target 'loss/web' has 1 loss" in runs.notes[0]


def test_names_that_collide_without_their_prefixes_keep_them(path):
    W, L = table()
    runs = read_runs(write(path, [*PLAIN[:3], "loss/x", "valid_x"], W, L))
    assert runs.targets == ("loss/x", "valid_x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: replaced(p, 4, "loss/arc", "3.2x"), r"line 4, column 'loss/arc': '3.2x' is no number"),
        (lambda p: replaced(p, 5, "weight/web", "lots"), "line 5, column 'weight/web': 'lots' is no number"),
        (lambda p: replaced(p, 3, "weight/web", "1.7"), r"line 3: the weights sum to .*, not 1: .*--weights"),
        (lambda p: replaced(p, 3, "weight/web", "-0.1"), "line 3, column 'weight/web': a weight of -0.1"),
        (lambda p: replaced(p, 6, "weight/math", ""), "line 6, column 'weight/math': is empty and"),
        (lambda p: p.write_text(p.read_text().replace("loss/arc", "loss/web")), "2 columns are called 'loss/web'"),
        (lambda p: p.write_text(p.read_text() + "1,2\n"), "line 8: 2 cells, the header has 5"),
        (lambda p: p.write_text(""), "0 lines that are not empty"),
        (lambda p: p.write_text(p.read_text().split("\n")[0]), "1 lines that are not empty"),
        (lambda p: p.write_text(p.read_text().split("\n", 1)[1]), "first line must name the columns"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "no UTF-8 text"),
        (lambda p: p.write_text("a,b\n1,2\n3,4\n"), "none side by side sum to 1"),
        (lambda p: p.write_text("w_a,w_b\n.5,.5\n1,0\n"), "use --targets"),
        (lambda p: p.write_text("w_a,w_b,train_a,train_b,loss\n.5,.5,.5,.5,1\n1,0,1,0,2\n"), "'w_' and with 'train_'"),
        (lambda p: p.write_text("w_a,w_b,loss_x\n.5,.5,1\n1,0,\n"), "no target has losses of two runs"),
    ],
)  # fmt: skip
def test_refusals_say_file_line_and_column(path, change, said):
    W, L = table()
    write(path, PLAIN, W, L)
    change(path)
    with pytest.raises(ValueError, match=said) as refusal:
        read_runs(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "w_*"}, "no column for weights is called 'w_\\*'; there are weight/web"),
        ({"targets": "mmlu"}, "no column for targets is called 'mmlu'"),
        ({"targets": "weight/web"}, "chosen as a weight and as a target"),
        ({"weights": "weight/web"}, "1 column of weights"),
    ],
)
def test_choices_that_are_not_there(path, options, said):
    W, L = table()
    with pytest.raises(ValueError, match=said):
        read_runs(write(path, PLAIN, W, L), **options)


def test_files_that_cannot_be_joined(tmp_path):
    W, L = table()
    one = write(tmp_path / "one.csv", ["w_a", "w_b", "w_c"], W, index="index")
    for names, index, shift, said in (
        (["loss_x", "loss_y"], "index", 100, "no value of its first column"),
        (["w_a", "loss_y"], "index", 0, "a column 'w_a' too"),
    ):
        two = write(tmp_path / "two.csv", names, L, index=index)
        rows = two.read_text().splitlines()
        two.write_text("\n".join([rows[0], *(f"{shift + i},{r.split(',', 1)[1]}" for i, r in enumerate(rows[1:], 1))]))
        with pytest.raises(ValueError, match=said):
            read_runs(one, two)
    two.write_text("index,loss_x\n1,2\n1,3\n")
    with pytest.raises(ValueError, match="is no index"):
        read_runs(one, two)


def test_columns_come_in_the_order_asked_for(path):
    W, L = table()
    runs = read_runs(write(path, PLAIN, W, L)).ordered(["math", "web", "code"], ["arc", "web"])
    np.testing.assert_allclose(runs.W, W[:, [2, 0, 1]])
    np.testing.assert_allclose(runs.L, L[:, ::-1])
    with pytest.raises(ValueError, match="the runs' domains are math, web, code; wanted are a"):
        runs.ordered(["a"], ["arc", "web"])


def test_regmix_runs(shared):
    folder = shared / "reference" / "regmix"
    if not folder.is_dir():
        pytest.skip(f"no runs at {folder}")
    runs = read_runs(folder / "regmix_train_1m.csv")
    assert (runs.W.shape, runs.L.shape) == ((512, 17), (512, 13))
    assert runs.domains[0] == "arxiv"
