"""Says where the bytes of container images are, what could go, and which budget is broken.

usage: python docker/size_audit.py IMAGE... [--format table|json|markdown|html] [--budget FILE] [--against IMAGE]
The same as `fanlight audit`. Exit code: 0 within budget, 1 a budget is broken, 2 an image cannot be read.

Needs the folder `audit` beside it, which in the repository is a link to fanlight/audit, and no other package.
"""

import sys

from audit.program import main

if __name__ == "__main__":
    sys.exit(main())
