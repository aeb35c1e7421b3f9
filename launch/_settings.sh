# shellcheck shell=bash
# Sourced by the scripts that start runs elsewhere: their settings, and commands that can be shown
# instead of run.
#   setting NAME DEFAULT WORDS   sets $NAME from --name=VALUE, else $DDMD_NAME, else DEFAULT.
#   parse "$@"                   reads flags; sets $ACTION and the array REST (all after --).
#   run COMMAND ...              shows a command and, unless --dry-run was given, runs it.
# Anything wrong is one line on stderr and exit code 2, before the first command. Bash 4.4 or newer.

ACTION=""
DRY_RUN=0
REST=()
SETTINGS=()
declare -A ABOUT

die() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

setting() {
  local variable="DDMD_$1"
  printf -v "$1" '%s' "${!variable-$2}"
  SETTINGS+=("$1")
  ABOUT[$1]="$3"
}

# Writes a word so that a shell reads it back as it is.
quoted() {
  if [[ "$1" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf '%s' "$1"; else printf '%s' "${1@Q}"; fi
}

line() {
  local word text=""
  for word in "$@"; do text+="${text:+ }$(quoted "$word")"; done
  echo "$text"
}

# The comment at the top of the script is its manual.
manual() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  show_settings
}

show_settings() {
  local key
  echo "settings, as --name=VALUE or DDMD_NAME=VALUE:"
  for key in "${SETTINGS[@]}"; do
    printf '  --%-34s %s\n' "$(tr '[:upper:]' '[:lower:]' <<< "$key")=${!key}" "${ABOUT[$key]}"
  done
}

parse() {
  local key
  while [ $# -gt 0 ]; do
    case "$1" in
      --) shift; REST=("$@"); break ;;
      --dry-run) DRY_RUN=1 ;;
      --help | -h) manual; exit 0 ;;
      --*=*)
        key="${1%%=*}"
        key="$(tr '[:lower:]-' '[:upper:]_' <<< "${key#--}")"
        [ -n "${ABOUT[$key]-}" ] || die "no setting ${1%%=*}; there are: $(tr '[:upper:]' '[:lower:]' <<< "${SETTINGS[*]}"); fields of the config go after --"
        printf -v "$key" '%s' "${1#*=}" ;;
      -*) die "what is $1? settings look like --name=VALUE; fields of the config go after --" ;;
      *)
        [ -z "$ACTION" ] || die "one action at a time: $ACTION or $1?"
        ACTION="$1" ;;
    esac
    shift
  done
  if [ "$DRY_RUN" = 1 ]; then
    echo "dry run: nothing below is run"
    show_settings
  fi
}

# Every setting named must have a value.
need() {
  local key
  for key in "$@"; do
    [ -n "${!key}" ] || die "no --$(tr '[:upper:]' '[:lower:]' <<< "$key") given: ${ABOUT[$key]}"
  done
}

run() {
  echo "+ $(line "$@")"
  [ "$DRY_RUN" = 1 ] || "$@"
}
