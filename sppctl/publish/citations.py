"""How to cite the methods that a checkpoint was made by."""

from __future__ import annotations

SPP = """@inproceedings{lu2024spp,
  title         = {{SPP}: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models},
  author        = {Lu, Xudong and Zhou, Aojun and Xu, Yuhui and Zhang, Renrui and Gao, Peng and Li, Hongsheng},
  booktitle     = {International Conference on Machine Learning},
  year          = {2024},
  eprint        = {2405.16057},
  archivePrefix = {arXiv}
}"""
# by prune.method, and by prune.allocation where that is a method of its own
PRUNING = {
    "magnitude": """@inproceedings{han2015learning,
  title     = {Learning both Weights and Connections for Efficient Neural Networks},
  author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2015}
}""",
    "wanda": """@inproceedings{sun2024wanda,
  title         = {A Simple and Effective Pruning Approach for Large Language Models},
  author        = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle     = {International Conference on Learning Representations},
  year          = {2024},
  eprint        = {2306.11695},
  archivePrefix = {arXiv}
}""",
    "sparsegpt": """@inproceedings{frantar2023sparsegpt,
  title         = {{SparseGPT}: Massive Language Models Can Be Accurately Pruned in One-Shot},
  author        = {Frantar, Elias and Alistarh, Dan},
  booktitle     = {International Conference on Machine Learning},
  year          = {2023},
  eprint        = {2301.00774},
  archivePrefix = {arXiv}
}""",
    "dsnot": """@inproceedings{zhang2024dsnot,
  title         = {Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse {LLMs}},
  author        = {Zhang, Yuxin and Zhao, Lirui and Lin, Mingbao and Sun, Yunyun and Yao, Yiwu and Han, Xingjia and
                   Tanner, Jared and Liu, Shiwei and Ji, Rongrong},
  booktitle     = {International Conference on Learning Representations},
  year          = {2024},
  eprint        = {2310.08915},
  archivePrefix = {arXiv}
}""",
    "owl": """@inproceedings{yin2024owl,
  title         = {Outlier Weighed Layerwise Sparsity ({OWL}): A Missing Secret Sauce for Pruning {LLMs} to High
                   Sparsity},
  author        = {Yin, Lu and others},
  booktitle     = {International Conference on Machine Learning},
  year          = {2024},
  eprint        = {2310.05175},
  archivePrefix = {arXiv}
}""",
}
