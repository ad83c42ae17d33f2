{{- define "nv-embed.fullname" -}}
{{- if contains "nv-embed" .Release.Name -}}
{{- .Release.Name | trunc 44 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-nv-embed" (.Release.Name | trunc 35 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "nv-embed.selector" -}}
app.kubernetes.io/name: nv-embed
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nv-embed.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "nv-embed.selector" . }}
{{- end -}}

{{- define "nv-embed.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end -}}

{{- define "nv-embed.claim" -}}
{{ .Values.persistence.existingClaim | default (printf "%s-weights" (include "nv-embed.fullname" .)) }}
{{- end -}}

{{- define "nv-embed.keysSecret" -}}
{{ .Values.apiKeys.existingSecret | default (printf "%s-keys" (include "nv-embed.fullname" .)) }}
{{- end -}}

{{- define "nv-embed.hasKeys" -}}
{{- if or .Values.apiKeys.existingSecret .Values.apiKeys.keys }}yes{{ end -}}
{{- end -}}

{{- /* Whether a Job fetches the weights, so that pods need neither the network nor a writable volume. */ -}}
{{- define "nv-embed.fetched" -}}
{{- if and .Values.download.enabled .Values.persistence.enabled .Values.model.id }}yes{{ end -}}
{{- end -}}

{{- define "nv-embed.several" -}}
{{- if eq .Values.autoscaling.mode "none" }}{{ if gt (int .Values.replicas) 1 }}yes{{ end }}{{ else }}{{ if gt (int .Values.autoscaling.minReplicas) 1 }}yes{{ end }}{{ end -}}
{{- end -}}

{{- define "nv-embed.tracesPort" -}}
{{- $host := .Values.traces.endpoint | trimPrefix "http://" | trimPrefix "https://" | splitList "/" | first -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $host) | default (ternary "443" "80" (hasPrefix "https" .Values.traces.endpoint)) -}}
{{- end -}}

{{- define "nv-embed.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "nv-embed.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "nv-embed.modelArguments" -}}
- {{ .Values.model.id | quote }}
{{- if .Values.model.revision }}
- --revision
- {{ .Values.model.revision | quote }}
{{- end }}
{{- end -}}

{{- define "nv-embed.hubToken" -}}
{{- if .Values.hfToken.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.hfToken.existingSecret }}
      key: {{ .Values.hfToken.key }}
{{- end }}
{{- end -}}

{{- define "nv-embed.modelEnvironment" -}}
{{- if .Values.model.id }}
- name: NV_EMBED_MODEL
  value: {{ .Values.model.id | quote }}
{{- end }}
{{- if .Values.model.revision }}
- name: NV_EMBED_REVISION
  value: {{ .Values.model.revision | quote }}
{{- end }}
{{- if include "nv-embed.fetched" . }}
- name: NV_EMBED_OFFLINE
  value: "true"
- name: TRITON_CACHE_DIR # the image's own is on the volume, which is mounted read-only here
  value: /tmp/triton
{{- end }}
- name: NV_EMBED_DEVICES
  value: {{ ternary "auto" "cpu" .Values.gpu.enabled | quote }}
- name: NV_EMBED_LOG_FORMAT
  value: {{ .Values.options.log_format | default "json" | quote }}
{{- end -}}

{{- define "nv-embed.resources" -}}
requests:
  cpu: {{ .Values.resources.cpu | quote }}
  memory: {{ .Values.resources.memory }}
limits:
  memory: {{ .Values.resources.memory }}
  {{- if .Values.gpu.enabled }}
  {{ .Values.gpu.resource }}: 1
  {{- end }}
{{- end -}}

{{- define "nv-embed.cacheVolume" -}}
- name: cache
  {{- if .Values.persistence.enabled }}
  persistentVolumeClaim:
    claimName: {{ include "nv-embed.claim" . }}
  {{- else }}
  emptyDir: {}
  {{- end }}
- name: tmp
  emptyDir: {}
{{- end -}}

{{- define "nv-embed.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}
