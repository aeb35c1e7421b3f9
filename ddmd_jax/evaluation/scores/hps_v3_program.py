"""HPS v3 in the environment of its authors' package: JSON lines in, JSON lines out; see `outside`.

Run by the Python of that environment, which has hpsv3 1.0 (pypi.org/project/hpsv3) and nothing of
ours; nothing here imports it. The score is mu, the first of the package's two outputs; it is asked
for one picture at a time, as rows of a batch are padded to the longest prompt.
"""

import hashlib
import json
import os
import sys


def main():
    """Answers until its standard input ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    from hpsv3 import HPSv3RewardInferencer

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = HPSv3RewardInferencer(checkpoint_path=sys.argv[1] if sys.argv[1:] else None,
                                  device=device)
    if device == 'cpu':  # its fp32 head takes the network's bf16 under CUDA's autocast alone
        model.model.float()
    for line in sys.stdin:
        asked = json.loads(line)
        with open(asked['file'], 'rb') as file:
            found = hashlib.sha256(file.read()).hexdigest()
        with torch.no_grad():  # which the package leaves to its caller
            # By name: 1.0 takes the paths first, the repository's later state the prompts.
            rows = model.reward(image_paths=[asked['file']], prompts=[asked['prompt']])
        answers.write(json.dumps({'file': asked['file'], 'sha256': found,
                                  'score': rows[0][0].item()}) + '\n')
        answers.flush()


if __name__ == '__main__':
    main()
