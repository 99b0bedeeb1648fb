"""OpenVINO: a transformers model exported and compressed to 4 bits, run by its own runtime.

Task "speed": format ("int4": symmetric groups of 128, every layer), batch, context, prefill, tokens.
"""

from pathlib import Path

from decoding import timed_turns, turns
from exchange import serve


def prepare(request):
    import numpy as np
    import openvino as ov
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    settings = request["settings"]
    folder = Path(request["folder"]) / f"openvino-{settings['format']}"
    if not (folder / "openvino_model.bin").exists():
        config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=128, ratio=1.0)
        exported = OVModelForCausalLM.from_pretrained(
            request["model"], export=True, compile=False, quantization_config=config
        )
        exported.save_pretrained(folder)
    core = ov.Core()
    options = {"INFERENCE_NUM_THREADS": request["num_threads"], "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(folder / "openvino_model.xml", "CPU", options)
    runner = compiled.create_infer_request()
    inputs = {name for port in compiled.inputs for name in port.names}

    def step(ids, cache, start):
        batch, length = ids.shape
        feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((batch, start + length), np.int64)}
        feed["position_ids"] = np.tile(np.arange(start, start + length), (batch, 1))
        if "beam_idx" in inputs:
            feed["beam_idx"] = np.arange(batch, dtype=np.int32)
        runner.infer({name: value for name, value in feed.items() if name in inputs})

    turn = timed_turns(step, runner.reset_state, settings, request["config"]["vocab_size"])
    return turn, {"weight_bytes": (folder / "openvino_model.bin").stat().st_size}


serve({"speed": turns(prepare)}, ["openvino", "nncf", "optimum-intel", "transformers"])
