from conftest import pack_command
import pytest, json
@pytest.mark.parametrize("recipe", ["t-mac", "bipolar-int", "lut-gemm"])
def test_e2e(cli, source, calibration_text, tmp_path, recipe):
    out = tmp_path / "p"
    r = cli(*pack_command(source, out, calibration_text, "--recipe", recipe, budget="230KiB"))
    print(r.out[-1500:], r.err[-800:])
    assert r.code == 0
    v = cli("verify", out, "--no-quality", "--json")
    print(json.dumps(v.json["kernels"], indent=1), v.json["within_budget"])
    print([row for row in v.json["bytes"]])
    assert v.code == 0
