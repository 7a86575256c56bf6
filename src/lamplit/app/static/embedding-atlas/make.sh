#!/bin/sh
# Make the files of this folder again: the map of embedding-atlas, for browsers, without a build step of ours.
# Needs npm and a network. Run with: sh src/lamplit/app/static/embedding-atlas/make.sh
# 0.23 is the last version that draws with WebGL 2 where there is no WebGPU: pages that come by plain HTTP from another
# machine have none.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init --yes >/dev/null
npm install --no-audit --no-fund --ignore-scripts --legacy-peer-deps embedding-atlas@0.23.0 esbuild@0.28.2
# Mosaic, which asks a database, is for another component of the package; esbuild leaves it out.
echo 'export const coordinator = null, isSelection = null, makeClient = null;' >mosaic.js
echo 'export { EmbeddingView } from "./node_modules/embedding-atlas/dist/component.js";' >entry.js
npx esbuild entry.js --bundle --minify --format=esm --target=es2022 \
  --alias:@uwdata/mosaic-core=./mosaic.js --alias:@uwdata/mosaic-sql=./mosaic.js --outfile=embedding-atlas.js
# The one change: a line between two parts of its status bar has its style in an attribute, which the page's content
# security policy refuses; app.css has that style for the class.
sed -i 's/ style="border-right: [^"]*"/ class="separator"/g' embedding-atlas.js
if grep -q 'style="' embedding-atlas.js; then echo "a style attribute is left" >&2; exit 1; fi
cp embedding-atlas.js node_modules/embedding-atlas/dist/clustering.worker.js "$here"
