"""What the papers report, in per cent, to stand beside ours. Other models and tasks: compare the order."""

from __future__ import annotations

# AE paper, Table 1: ViT-B/32, 8 vision tasks, M = 50 %, absolute accuracy. TSV-M: TSV paper, Table 2.
ZERO_SHOT, FINE_TUNED = 48.1, 90.4
ADDITION: dict[str, dict[str, float]] = {
    "task_arithmetic": {"all": 70.8, "rand_select": 64.3, "pca": 53.2, "ae_adam": 68.9},
    "ties": {"all": 75.1, "rand_select": 65.5, "pca": 53.3, "ae_adam": 68.7},
    "tsv": {"all": 85.9},
}
LOCALIZE = {"all": 76.7, "rand_select": 54.6, "balanced": 69.1}
# AE paper, Table 4: ViT-B/32, target and control after forgetting.
NEGATION = {"true": (24.0, 64.9), "rand_proj": (48.2, 63.3), "pca": (31.9, 61.0), "ae_adam": (30.7, 60.5)}
# AE paper, Table 16: ViT-B/32, mean and standard deviation over 5 orders.
ONLINE = {
    ("rand_select", "task_arithmetic"): "62.0 ± 3.7",
    ("ae_paper", "task_arithmetic"): "66.6 ± 0.9",
    ("rand_select", "tsv"): "65.6 ± 3.2",
    ("ae_paper", "tsv"): "69.0 ± 1.0",
}
# AE paper, Table 3: ViT-B/32, 6 unseen tasks, 16 shots.
OOD = {"all": 83.7, "rand_select": 82.9, "pca": 82.9, "ae_adam": 83.0}
# TSV paper, Table 4: ViT-B/32, 8 tasks, normalised accuracy.
ABLATION = {"neither (the sum)": 76.5, "low rank only": 75.2, "orthogonal only": 82.6, "both": 92.3}
# AE paper, Table 9: normalised accuracy of task arithmetic by temperature.
TEMPERATURE = {1.0: 73.6, 5.0: 74.4}
# DeVec paper, Table 1: ViT-B/32, 8 tasks.
DEVEC = {
    ("task_arithmetic", "none"): 69.0,
    ("task_arithmetic", "shared"): 73.6,
    ("adamerging", "none"): 80.1,
    ("adamerging", "shared"): 82.5,
}
