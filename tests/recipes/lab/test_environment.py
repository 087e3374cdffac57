import subprocess

from recipes.lab import environment


def test_the_commit_is_dirty_where_code_differs_but_not_where_a_recipe_wrote(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    files = [
        tmp_path / "recipes" / name for name in ("lab/environment.py", "lottery/plots/a.png", "lottery/mnist.jsonl")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(files[0]))
    clean = environment.commit()
    assert len(clean) == 12
    for file in files[1:]:
        file.write_text("2")
    (tmp_path / "notes.txt").write_text("not the project's")
    assert environment.commit() == clean
    files[0].write_text("2")
    assert environment.commit() == f"{clean}-dirty"
    monkeypatch.setattr(environment, "__file__", str(tmp_path.parent / "nowhere" / "environment.py"))
    assert environment.commit() is None
