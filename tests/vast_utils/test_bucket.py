"""A run whose state is in a bucket, on a machine that is lost, with `logs -f` looking on from another terminal."""

from __future__ import annotations

import json
import re

from tests.stores.fake_s3 import SECRET, serving
from tests.vast_utils.rented import until

STUB = """
import json, pathlib, sys, time
import obstore
where, _, prefix = sys.argv[sys.argv.index("--sync") + 1].removeprefix("s3://").partition("/")
bucket = obstore.store.S3Store(where, prefix=prefix, client_options={"allow_http": True})
try:
    begin = int(bytes(obstore.get(bucket, "state").bytes()))
except FileNotFoundError:
    begin = 0
print("begins at", begin, flush=True)
for step in range(begin, 40):
    print("step", step, flush=True)
    obstore.put(bucket, "state", b"%d" % (step + 1), use_multipart=False)
    time.sleep(0.1)
run = pathlib.Path("outputs/toy")
run.mkdir(parents=True)
(run / "results.jsonl").write_text(json.dumps({"steps": step + 1}))
"""


def test_a_lost_run_goes_on_from_its_bucket_and_logs_follow_it_over_machines(rented, monkeypatch):
    (rented.project / "run.py").write_text(STUB)
    with serving(monkeypatch) as bucket:
        words = rented.launch_words("--name", "mine", "--bucket", "s3://ours/runs/")
        launch = rented.start("launch", *words, "--", "run.py", aws=True)
        kept = rented.folder / "state" / "mine" / "mine.log"
        until(lambda: kept.exists() and "step 5" in kept.read_text())
        assert int(bucket.objects["ours/runs/mine/state"]) > 5
        logs = rented.start("logs", "-f", "mine")
        with rented.market.lock:
            (lease,) = rented.market.leases.values()
            rented.market.end(lease)
        out, _ = launch.communicate(timeout=120)
        assert launch.returncode == 0, out
        followed, _ = logs.communicate(timeout=60)
        assert logs.returncode == 0, followed
    begun = [int(step) for step in re.findall(r"begins at (\d+)", followed)]
    assert len(begun) == len(rented.machines) == 2
    assert 0 == begun[0] < 5 < begun[1]
    assert json.loads(rented.result()) == {"steps": 40}
    assert followed == kept.read_text()
    assert followed.endswith("step 39\n")
    files = [path for path in rented.folder.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
